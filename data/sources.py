"""The corpora that can be prepared, and which of them a configuration names."""

from conf.text import DataConfig
from data.corpora import TextCorpus
from data.hub import HubCorpus, HubPiece
from data.pieces import Piece

AnyCorpus = TextCorpus | HubCorpus
AnyPiece = Piece | HubPiece


def find_text(data: DataConfig) -> AnyCorpus:
    """Returns the text that a configuration names. Raises ValueError for text that cannot be found
    or split as asked."""
    return HubCorpus(data) if data.source == "hub" else TextCorpus(data)
