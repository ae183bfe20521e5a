"""Accuracy on long-tailed data: ELF and the same network without exits, over paired seeds.

    python -m benchmarks.accuracy.run [--only FIELD=VALUE,...] [--limit-minutes M] [--jobs N]
    python -m benchmarks.accuracy.page

`run` trains the runs that benchmarks/results/accuracy-digits.jsonl lacks, and `page` writes
docs/accuracy.md from that file. benchmarks/README.md says what the modules do.
"""
