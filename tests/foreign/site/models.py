"""Models of a project that uses fields of other packages; appended to the application's models."""

import secrets

from django.db import models
from django_cryptography.fields import encrypt
from django_extensions.db.fields import RandomCharField
from encrypted_fields.fields import EncryptedCharField, SearchField
from encrypted_model_fields.fields import EncryptedCharField as FernetCharField
from model_utils.models import TimeStampedModel
from pgcrypto.fields import CharPGPSymmetricKeyField
from shortuuid.django_fields import ShortUUIDField
from simple_history.models import HistoricalRecords

import pghistory


class Fernet(models.Model):
    secret = FernetCharField(max_length=80, default=secrets.token_hex)


class FernetBlank(models.Model):
    secret = FernetCharField(max_length=80, default=secrets.token_hex, blank=True)


class Cryptography(models.Model):
    secret = encrypt(models.CharField(max_length=80, default=secrets.token_hex))


class Unsearchable(models.Model):
    secret = EncryptedCharField(max_length=80, default=secrets.token_hex)


class Searchable(models.Model):
    secret = EncryptedCharField(max_length=80, default=secrets.token_hex)
    search = SearchField(hash_key="0" * 32, encrypted_field_name="secret")


class Pgp(models.Model):
    secret = CharPGPSymmetricKeyField(max_length=80, default=secrets.token_hex)


class Stamped(TimeStampedModel):
    secret = models.CharField(max_length=80, default=secrets.token_hex)


class RandomNeighbour(models.Model):
    secret = models.CharField(max_length=80, default=secrets.token_hex)
    slug = RandomCharField(length=12)


class Short(models.Model):
    secret = ShortUUIDField()


class WithHistory(models.Model):
    secret = models.CharField(max_length=80, default=secrets.token_hex)
    history = HistoricalRecords()


@pghistory.track()
class WithEvents(models.Model):
    secret = models.CharField(max_length=80, default=secrets.token_hex)


class Integration(models.Model):
    name = models.CharField(max_length=80)
    reference = models.CharField(max_length=80)
    remarks = models.TextField()
    parameters = models.JSONField(default=dict)
    invoice_number = models.CharField(max_length=40)
    checksum = models.CharField(max_length=64)
