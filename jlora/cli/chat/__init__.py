"""`jlora chat`."""

from jlora.cli.chat.options import Chat as Chat
from jlora.cli.chat.talk import run as run
