"""Results as one HTML page: `elf-fast eval --report` and the demo.

`markup` makes elements, `plots` draws, `sections` turns numbers into parts of a page, `run` puts
the page of an evaluation together.
"""
