"""The pages of the example project, and the metrics."""

from django.urls import include, path

from core.urls import urlpatterns as project_urls

urlpatterns = [*project_urls, path("rotator/", include("rotator.urls"))]
