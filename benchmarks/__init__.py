"""The benchmarks of elf_fast; README.md says which command answers which question."""
