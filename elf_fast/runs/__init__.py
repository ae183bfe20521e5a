"""The settings, data, network and files of a training run.

`config` has the settings. From them `datasets` makes the data and `networks` the network.
`files` writes and reads single files, `checkpoints` the folders that a run resumes from, and
`opening` reads a finished run. `evaluation` measures a network on a loader.
"""
