"""The host-model adapter: configuration, model class, processor, checkpoints."""

import transformers

from .compat import check_transformers_version

check_transformers_version(transformers.__version__)
