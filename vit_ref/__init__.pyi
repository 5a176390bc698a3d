from . import preprocessing as preprocessing
from .errors import CheckpointError as CheckpointError
from .errors import ConfigError as ConfigError
from .errors import InputError as InputError
from .errors import MappingError as MappingError
from .model.config import ViTConfig as ViTConfig
from .model.vit import VisionTransformer as VisionTransformer
from .testing.parametrize import parametrize_with_checks as parametrize_with_checks
from .verify.candidates.declaration import Candidate as Candidate
from .verify.candidates.declaration import Reference as Reference
from .verify.pairs.session import compare as compare
from .verify.proposals.proposal import propose as propose
from .verify.results import CandidateReport as CandidateReport
from .verify.session import check_port as check_port
from .weights.pretrained import from_pretrained as from_pretrained
from .weights.pretrained import save_pretrained as save_pretrained

__version__: str
