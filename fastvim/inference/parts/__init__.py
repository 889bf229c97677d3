"""Inference over anything large: work cut into parts that are computed and written whole.

A run has a fixed list of images (`listing`, from the `sources`) and a `manifest` of what all of its
parts have in common. A part that exists is done. So processes need not know each other: each
computes what is missing of its share (`loop`), whether `shards`, `devices` or Ray (`over_ray`) say
what that is. After a kill the same command goes on. Whoever finds all parts collects them
(`collect`). `work` says what a command must provide; `run` puts all together.
"""
