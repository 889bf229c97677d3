"""Weights in files: this library's, and those that others published for its models.

A file takes one way into a model:

1. `files.read` reads it (`unpickle`: plain values alone, nothing in a file is executed). `formats`
   recognises who wrote it and takes the averaged or the raw weights; `config_text` reads what the
   file itself tells of its model.
2. `resolve` names the weights as we do (`names`, whole segmentors and detectors `dense_names`) and
   says what they are of: their shapes tell sizes (`options`, `dense_metadata`), the caller, the
   file or the table of published files the rest. What is assumed is said.
3. `build.build_model` builds that model.
4. `fit.load_state` fits the weights to the model, its grid and its kind, and loads them: nothing
   may be missing, nothing left over.

`published` finds a file by name: `table` says where it is, `fetch` brings it here.
`usage` says how images are prepared for a model and what its outputs are called.
`hub` writes a folder that timm, transformers and the Hugging Face hub load; `card` the model card.
`classes` says which classes weights know.
`load_model` goes all the way. `load_weights` starts from a model that exists: steps 1 and 4 alone.
`convert` goes from file to file: steps 1 and 2, and back to published names and formats.
"""

from fastvim.weights.classes import known_classes, same_classes
from fastvim.weights.convert import convert
from fastvim.weights.dense_names import head_of
from fastvim.weights.files import METADATA_KEY, Checkpoint, read, save
from fastvim.weights.fit import checkpoint_filter_fn, load_state, load_weights, take_classes
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
    "known_classes",
    "load_model",
    "load_state",
    "load_weights",
    "published_file",
    "read",
    "resolve",
    "same_classes",
    "save",
    "take_backbone",
    "take_classes",
    "to_published",
]
