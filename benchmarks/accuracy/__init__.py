"""Accuracy on long-tailed digits: ELF beside the same network without exits, over paired seeds.

    python -m benchmarks.accuracy.run [--only FIELD=VALUE,...] [--limit-minutes M] [--jobs N]
    python -m benchmarks.accuracy.page

`run` trains what is missing in benchmarks/results/accuracy-digits.jsonl, for as long as it may;
`page` writes docs/accuracy.md from that file. runs says what is trained, trial how, results keeps
it, paired does the statistics.
"""
