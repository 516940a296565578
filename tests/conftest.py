"""No test reaches for a model hub: what is not local is refused at once."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
