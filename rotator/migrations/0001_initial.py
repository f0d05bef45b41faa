
import django.db.models.deletion
import django.db.models.functions.datetime
from django.db import migrations, models


class Migration(migrations.Migration):

    initial = True

    dependencies = [
    ]

    operations = [
        migrations.CreateModel(
            name='Rotation',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('target', models.CharField(help_text='As the user writes it: app.Model.field.', max_length=255)),
                ('database', models.CharField(help_text="Django's alias of the target's database.", max_length=255)),
                ('bound', models.JSONField(help_text='The upper key bound, frozen at the start; null where empty.', null=True)),
                ('started_xid', models.BigIntegerField(help_text='The transaction that began it (xid8): rows with an older xmin have not been written since.')),
                ('options', models.JSONField(default=dict, help_text='The options of the latest run.')),
                ('status', models.CharField(choices=[('running', 'Running'), ('interrupted', 'Interrupted'), ('failed', 'Failed'), ('completed', 'Completed'), ('abandoned', 'Abandoned')], default='running', max_length=16)),
                ('generation', models.BigIntegerField(default=1, help_text='Fences out an older process of this rotation.')),
                ('active_seconds', models.FloatField(default=0.0, help_text='Time spent over all runs.')),
                ('rows_total', models.BigIntegerField(default=0)),
                ('rows_total_is_exact', models.BooleanField(default=True)),
                ('rows_done', models.BigIntegerField(default=0)),
                ('late_rows', models.BigIntegerField(default=0, help_text='Rows that were committed late and rotated outside the ranges.')),
                ('started_at', models.DateTimeField(db_default=django.db.models.functions.datetime.Now())),
                ('updated_at', models.DateTimeField(db_default=django.db.models.functions.datetime.Now(), help_text="The owner's heartbeat.")),
                ('finished_at', models.DateTimeField(null=True)),
                ('owner_host', models.CharField(blank=True, default='', max_length=255)),
                ('owner_pid', models.BigIntegerField(null=True)),
                ('owner_process', models.CharField(blank=True, default='', help_text='What tells this process from all others of its host.', max_length=255)),
                ('owner_user', models.CharField(blank=True, default='', max_length=255)),
                ('owned_since', models.DateTimeField(db_default=django.db.models.functions.datetime.Now())),
                ('version', models.CharField(help_text='The version of this software that ran last.', max_length=32)),
                ('error', models.TextField(blank=True, default='', help_text='One sentence, never a value of the column.')),
            ],
            options={
                'constraints': [models.UniqueConstraint(condition=models.Q(('status__in', ('running', 'interrupted', 'failed'))), fields=('target', 'database'), name='rotator_one_unfinished_rotation'), models.CheckConstraint(condition=models.Q(('status__in', ['running', 'interrupted', 'failed', 'completed', 'abandoned'])), name='rotator_rotation_status_known'), models.CheckConstraint(condition=models.Q(models.Q(('finished_at__isnull', True), ('status__in', ('running', 'interrupted', 'failed'))), models.Q(('finished_at__isnull', False), ('status__in', ['completed', 'abandoned'])), _connector='OR'), name='rotator_rotation_finished_at_its_end'), models.CheckConstraint(condition=models.Q(('active_seconds__gte', 0), ('generation__gte', 1), ('late_rows__gte', 0), ('rows_done__gte', 0), ('rows_total__gte', 0)), name='rotator_rotation_figures_not_negative')],
            },
        ),
        migrations.CreateModel(
            name='CompletedRange',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('after', models.JSONField(help_text="The last key before the range; null at the table's start.", null=True)),
                ('through', models.JSONField(help_text="The range's last key.")),
                ('rows', models.BigIntegerField()),
                ('seconds', models.FloatField()),
                ('committed_at', models.DateTimeField(db_default=django.db.models.functions.datetime.Now())),
                ('rotation', models.ForeignKey(on_delete=django.db.models.deletion.CASCADE, related_name='completed_ranges', to='rotator.rotation')),
            ],
            options={
                'constraints': [models.UniqueConstraint(fields=('rotation', 'after'), name='rotator_range_begins_once', nulls_distinct=False), models.UniqueConstraint(fields=('rotation', 'through'), name='rotator_range_ends_once'), models.CheckConstraint(condition=models.Q(('after__isnull', True), models.Q(('after', models.F('through')), _negated=True), _connector='OR'), name='rotator_range_not_empty'), models.CheckConstraint(condition=models.Q(('rows__gte', 0), ('seconds__gte', 0)), name='rotator_range_figures_not_negative')],
            },
        ),
    ]
