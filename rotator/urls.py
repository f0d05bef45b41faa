"""The metrics of rotations; a project includes them where only its Prometheus can read them."""

from django.urls import path

from rotator.views import metrics

app_name = "rotator"
urlpatterns = [path("metrics", metrics, name="metrics")]
