"""Data modules, the exact order of their samples, and sample sets.

Import from the files themselves: `fastvim.data.images.ImageData` needs Lightning, while
`fastvim.data.samples` and `fastvim.data.transforms` do not.
"""
