"""What a run is made of, leaves behind, and how it is opened again.

`config` has the settings. From them `datasets` makes the data and `networks` the network.
`files` writes and reads single files, `checkpoints` the folders that a run resumes from, `opening`
a finished run. `evaluation` measures a network on a loader.
"""
