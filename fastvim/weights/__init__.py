"""Weights in files: this library's, and those that others published for its models.

A file takes one way into a model:

1. `files.read` reads it, plain values alone: nothing in a file is executed.
2. `formats` recognises who wrote it, and takes the averaged or the raw weights.
3. `names.from_published` turns published names into ours.
4. `options.find_options` tells the options of the model from the shapes of its weights.
5. `fit.checkpoint_filter_fn` fits the weights to a given model: its grid, its kind.
6. `fit.load_state` loads them: nothing may be missing, nothing left over.

`published` finds a file by name: `table` says where it is, `fetch` brings it here.
`load_model` goes all the way. `load_weights` starts from a model that exists: it leaves out step 4.
`convert` goes from file to file: it leaves out steps 5 and 6.
"""

from fastvim.weights.convert import convert
from fastvim.weights.dense_names import head_of
from fastvim.weights.files import METADATA_KEY, Checkpoint, read, save
from fastvim.weights.fit import checkpoint_filter_fn, load_state, load_weights
from fastvim.weights.load import load_model
from fastvim.weights.names import from_published, to_published
from fastvim.weights.options import find_options
from fastvim.weights.published import find, is_file_name, published_file
from fastvim.weights.resolve import resolve, take_backbone

__all__ = [
    "METADATA_KEY",
    "Checkpoint",
    "checkpoint_filter_fn",
    "convert",
    "find",
    "find_options",
    "from_published",
    "head_of",
    "is_file_name",
    "load_model",
    "load_state",
    "load_weights",
    "published_file",
    "read",
    "resolve",
    "save",
    "take_backbone",
    "to_published",
]
