"""Long-tailed image data: loading functions that return `Splits`, transforms, and a loader.

`longtail` chooses the samples of a long-tailed training set. `digits`, `cifar`, `folder` and
`lists` load one kind of data set each. torchvision (extra `train`) is imported when a function
needs it.
"""

from .cifar import cifar_lt
from .digits import long_tailed_digits
from .folder import image_folder
from .images import DecodeError
from .inputs import image_paths
from .lists import PUBLISHED, from_lists, published
from .loader import ImageLoader, WorkerError
from .longtail import long_tailed_counts, long_tailed_subset
from .preprocessing import Preprocessing
from .splits import DataError, LabelledImages, Splits
from .transforms import Augmentation, Transforms, image_transforms, small_image_transforms

__all__ = [
    "PUBLISHED",
    "Augmentation",
    "DataError",
    "DecodeError",
    "ImageLoader",
    "LabelledImages",
    "Preprocessing",
    "Splits",
    "Transforms",
    "WorkerError",
    "cifar_lt",
    "from_lists",
    "image_folder",
    "image_paths",
    "image_transforms",
    "long_tailed_counts",
    "long_tailed_digits",
    "long_tailed_subset",
    "published",
    "small_image_transforms",
]
