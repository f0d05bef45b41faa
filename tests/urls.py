"""The pages of the example project, and the metrics."""

from django.urls import path

from core.urls import urlpatterns as project_urls
from rotator.views import metrics

urlpatterns = [*project_urls, path("rotator/metrics", metrics)]
