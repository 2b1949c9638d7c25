"""The trainer's side: `Preconditioner` and what it can raise, warn and take."""

from skfac.client.adaptive import LevenbergMarquardt
from skfac.client.config import PreconditionerConfig
from skfac.client.layers import PassThroughWarning
from skfac.client.preconditioner import Preconditioner
from skfac.wire.credentials import Credentials
from skfac.wire.errors import (
    ConfigurationError,
    LateVersionError,
    ServiceError,
    SkfacError,
)

__all__ = [
    "ConfigurationError",
    "Credentials",
    "LateVersionError",
    "LevenbergMarquardt",
    "PassThroughWarning",
    "Preconditioner",
    "PreconditionerConfig",
    "ServiceError",
    "SkfacError",
]
