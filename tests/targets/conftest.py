import sys
from pathlib import Path

# The made-up subjects are shared by several test files of this folder.
sys.path.insert(0, str(Path(__file__).parent))
