"""Random views of images: the published augmentations, applied to whole batches on the device."""

from moco.views.specs import VIEWS, ViewSpec, view_specs
from moco.views.two_views import OneView, TwoViews

__all__ = ["VIEWS", "OneView", "TwoViews", "ViewSpec", "view_specs"]
