"""Serving a model folder: LitServe hosts the generator; OpenAI clients and a chat page talk to it.

The package name is shared with a ``serve`` folder of the user's; see ``bumblebee/shared_packages.py``.
"""

from bumblebee.shared_packages import extend_path, lazy_attributes

__path__ = extend_path(__path__, __name__)
__getattr__ = lazy_attributes(__name__, {})
