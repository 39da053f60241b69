"""Settings: the typed schema, its loading from presets and overrides, and the rules that span settings.

Nothing here imports torch: a wrong setting is found before anything slow or distributed starts.
"""

from remax_megatron.config.schema import Config as Config
from remax_megatron.config.schema import ConfigError as ConfigError
