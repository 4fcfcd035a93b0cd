"""What an adapter changed, as tables, files and pictures."""

from jlora.report.comparison import Comparison as Comparison
from jlora.report.comparison import PromptComparison as PromptComparison
from jlora.report.comparison import compare as compare
from jlora.report.comparison import next_token_distance as next_token_distance
from jlora.report.show import plot_history as plot_history
from jlora.report.show import print_comparison as print_comparison
