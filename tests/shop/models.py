"""Tables with every kind of key and of secret."""

import uuid

from django.contrib.postgres.functions import RandomUUID
from django.core.validators import RegexValidator
from django.db import models
from django.db.models.functions import Now, Upper
from django.utils import timezone

from tests.shop.fields import (
    ChecksumField,
    EncryptedField,
    HashedField,
    HexUuidField,
    ModifiedField,
    NewlyEncryptedField,
    OnceField,
    OwnDefaultField,
    PrefixedKeyField,
    PreparedAsSqlField,
    RandomlyEncryptedField,
    ReversedField,
    SaltedField,
    SavedAsSqlField,
    SearchField,
    TagField,
)
from tests.shop.generators import big_number, blob, constant, letters, number, token


class Secrets(models.Model):
    """A secret of each kind."""

    as_uuid = models.UUIDField(default=uuid.uuid4, unique=True)
    as_char = models.CharField(max_length=40, default=token, unique=True)
    as_text = models.TextField(default=letters)
    as_bytes = models.BinaryField(default=blob)
    as_integer = models.IntegerField(default=number)
    as_big_integer = models.BigIntegerField(default=big_number)
    as_custom = ReversedField(max_length=60, default=token)
    as_hex = HexUuidField(default=uuid.uuid4)
    nullable = models.CharField(max_length=40, default=token, null=True)
    status = models.CharField(max_length=10, default="active")
    note = models.TextField(default="as it was")

    class Meta:
        abstract = True


class ByInteger(Secrets):
    id = models.IntegerField(primary_key=True)


class BySmallInteger(Secrets):
    id = models.SmallIntegerField(primary_key=True)


class ByBigInteger(Secrets):
    id = models.BigAutoField(primary_key=True)


class ByUuid(Secrets):
    id = models.UUIDField(primary_key=True, default=uuid.uuid4)


class ByChar(Secrets):
    id = models.CharField(primary_key=True, max_length=40)


class ByMoment(Secrets):
    id = models.DateTimeField(primary_key=True, default=timezone.now)


class ByDecimal(Secrets):
    id = models.DecimalField(primary_key=True, max_digits=30, decimal_places=10)


class ByPair(Secrets):
    pk = models.CompositePrimaryKey("shop", "number")
    shop = models.CharField(max_length=20)
    number = models.IntegerField()


class Order(models.Model):
    """What projects rotate most: a key without a default, and other fields."""

    created_at = models.DateTimeField(default=timezone.now)
    status = models.CharField(max_length=10, default="active")
    is_paid = models.BooleanField(default=False)
    api_key = models.CharField(max_length=80, unique=True)
    webhook_secret = models.CharField(max_length=80, default=token)
    generated = models.GeneratedField(
        expression=Upper("api_key"), output_field=models.TextField(), db_persist=True
    )
    parent = models.ForeignKey("self", null=True, on_delete=models.CASCADE)


class Checked(models.Model):
    """Columns that belong together."""

    token = models.CharField(max_length=80)
    checksum = models.CharField(max_length=64)
    changed_at = models.DateTimeField(auto_now=True)


class SpecialOrder(Order):
    """Multi-table inheritance: the key is in the parent's table."""

    discount = models.IntegerField(default=0)
    coupon = models.CharField(max_length=40, default=token)


class OrderProxy(Order):
    class Meta:
        proxy = True


class Odd(models.Model):
    """A table and columns with names that have to be quoted, in a schema of their own."""

    key = models.BigAutoField(primary_key=True, db_column='the "key" %s')
    secret = models.CharField(max_length=40, default=token, db_column='Secret "%(x)s"')

    class Meta:
        db_table = 'odd schema"."Odd %% table'
        managed = False


class Partitioned(models.Model):
    """Made by SQL, as Django has no partitions."""

    pk = models.CompositePrimaryKey("day", "number")
    day = models.DateField()
    number = models.IntegerField()
    secret = models.CharField(max_length=40, default=token)

    class Meta:
        managed = False


class Namesake(models.Model):
    """Columns with the names that the rotator's own statements use. Made by SQL."""

    pk = models.CompositePrimaryKey(
        "rotator_position", "rotator_old_0", "rotator_key", "rotator_text", "jsonb_build_array"
    )
    rotator_position = models.IntegerField()
    rotator_old_0 = models.IntegerField()
    rotator_key = models.IntegerField()
    rotator_text = models.IntegerField()
    jsonb_build_array = models.IntegerField()
    rotator_place = models.IntegerField()
    digest = models.UUIDField(default=uuid.uuid4)

    class Meta:
        managed = False


class Word(models.Model):
    """Made by SQL, under the collation that a test is about."""

    word = models.TextField(primary_key=True)
    secret = models.UUIDField(default=uuid.uuid4)

    class Meta:
        managed = False


class Coded(models.Model):
    """Made by SQL, so that a test may drop, rename or rewrite the table, and choose the columns' types."""

    id = models.BigIntegerField(primary_key=True)
    secret = models.TextField(default=token)

    class Meta:
        managed = False


class OrderView(models.Model):
    """A view, which has no rows of its own."""

    api_key = models.CharField(max_length=80, default=token)

    class Meta:
        managed = False


class Application(models.Model):
    """A secret of which the table holds the hash."""

    name = models.CharField(max_length=40, default=token)
    nickname = models.CharField(max_length=40, default=token)
    secret = HashedField(max_length=64, default=token)
    checksum = ChecksumField(max_length=64, default="")
    encrypted = EncryptedField(default=blob)


class Code(models.Model):
    """Others refer to a column that is not the primary key."""

    code = models.CharField(max_length=40, unique=True, default=token)


class Use(models.Model):
    code = models.ForeignKey(Code, to_field="code", on_delete=models.CASCADE)


class WrittenInSql(models.Model):
    """Values that are changed on their way to the server, in each way there is."""

    placeholder = EncryptedField(default=blob)
    placeholder_sql = NewlyEncryptedField(default=blob)
    prepared = PreparedAsSqlField(max_length=40, default=token)
    saved = SavedAsSqlField(max_length=40, default=token)
    encrypted = RandomlyEncryptedField(max_length=80, default=constant)


class Client(models.Model):
    """A secret among fields that change with each save, and derive nothing from it."""

    secret = models.CharField(max_length=80, default=token, blank=True)
    modified = ModifiedField(null=True)
    tag = TagField(max_length=16, default="")
    once = OnceField(max_length=16, default="")
    encrypted = RandomlyEncryptedField(max_length=80, default="")


class Optional(models.Model):
    """Secrets that can be blank, and are not stored as an empty text then."""

    encrypted = RandomlyEncryptedField(max_length=80, default=token, blank=True)
    reversed = ReversedField(max_length=80, default=token, blank=True)
    nullable = ReversedField(max_length=80, default=token, blank=True, null=True)


class Salted(models.Model):
    """A secret, and a salted hash of it."""

    secret = models.CharField(max_length=80, default=token)
    salted = SaltedField(max_length=40, default="")


class Searchable(models.Model):
    """A secret that is found by its hash, and was by another one."""

    secret = RandomlyEncryptedField(max_length=80, default=token)
    search = SearchField(max_length=64, default="")
    old_search = SearchField(max_length=64, default="")


class MakerManager(models.Manager["Maker"]):
    def create_ticket_text(self) -> str:
        return f"{self.model.__name__}-{token()}"


class Maker(models.Model):
    """Makes its keys by methods of the model."""

    key = models.CharField(max_length=40)
    pin = models.CharField(max_length=10)
    number = models.UUIDField()
    blob = models.BinaryField()
    hashed_key = models.CharField(max_length=128)
    private_key = models.TextField(default="")
    ticket = models.CharField(max_length=64, default="")
    serial = models.CharField(max_length=64, default="")
    voucher = models.CharField(max_length=64, default="")
    options = models.JSONField(default=dict)
    keyhash = models.CharField(max_length=64, default="")
    jti = models.CharField(max_length=64, default=token)
    token_jti = models.CharField(max_length=64, default="")
    long = models.TextField(default="")
    count = models.IntegerField(default=0)
    identifier = models.CharField(max_length=20, default="", validators=[RegexValidator("^[A-Z]{20}$")])
    own_default = OwnDefaultField(max_length=40)
    by_server = models.UUIDField(db_default=RandomUUID())
    same_by_server = models.DateTimeField(db_default=Now())

    objects = MakerManager()

    @staticmethod
    def generate_key() -> str:
        return letters()

    @classmethod
    def generate_for_class(cls) -> str:
        return f"{cls.__name__} {token()}"

    def generate_for_row(self) -> str:
        return f"{self.pk} {token()}"

    def generate_serial(self) -> str:
        return f"{self.pk}-{token()}"

    def generate_voucher(self) -> str:
        self.voucher = token()
        self.save()
        return self.voucher


class PrefixedKey(models.Model):
    id = PrefixedKeyField(primary_key=True, max_length=20)
    secret = models.TextField()


class BinaryKey(models.Model):
    id = models.BinaryField(primary_key=True)
    secret = models.TextField()


class IntervalKey(models.Model):
    id = models.DurationField(primary_key=True)
    secret = models.TextField()
