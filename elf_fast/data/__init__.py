"""Long-tailed image data: loading functions that return `Splits`.

longtail says which samples a long-tailed set keeps; digits loads one kind of data set.
"""

from .digits import long_tailed_digits
from .longtail import long_tailed_counts, long_tailed_subset
from .splits import DataError, LabelledImages, Splits

__all__ = [
    "DataError",
    "LabelledImages",
    "Splits",
    "long_tailed_counts",
    "long_tailed_digits",
    "long_tailed_subset",
]
