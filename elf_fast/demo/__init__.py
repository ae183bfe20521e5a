"""`elf-fast demo`: long-tailed digits, with exits and without, from training to a report.

`run` puts it together: `loop` trains (the network is `runs.demo_network`), `throughput` times,
`summary` turns results into a table and sentences, and `page` puts them on a page.
"""
