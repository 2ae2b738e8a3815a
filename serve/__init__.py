"""`bumblebee serve`: a model folder behind OpenAI-compatible endpoints and a chat page, on LitServe.

The package name is shared with a ``serve`` folder in the user's project; see ``bumblebee/utils/shared_packages.py``.
"""

from bumblebee.utils.shared_packages import extend_path, lazy_attributes

__path__ = extend_path(__path__, __name__)
__getattr__ = lazy_attributes(__name__, {})
