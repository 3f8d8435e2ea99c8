"""Two random views of each image, made in batches."""

from moco.views.specs import VIEWS, ViewSpec, view_specs
from moco.views.two_views import OneView, TwoViews

__all__ = ["VIEWS", "OneView", "TwoViews", "ViewSpec", "view_specs"]
