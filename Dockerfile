FROM python:3.13-slim

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1

WORKDIR /app

# The dependencies are a layer of their own: they change less often than the code.
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY docs/changelog.md docs/changelog.md
COPY rotator/__init__.py rotator/__init__.py
RUN pip install --quiet --constraint constraints.txt --editable '.[project,celery]'

COPY . .

RUN useradd --system app
USER app

CMD ["python", "manage.py", "help"]
