"""Python imports this at its start, because `railyard run` puts this folder in front on PYTHONPATH. Starts the adapter if a
setting asks for it, then hands on to the sitecustomize that this one hides. Must be harmless, and cheap, in every process of
a job, whatever its Python: nothing is imported that is not there yet, unless something is asked for."""

import os
import sys


def _start():
    env = os.environ
    asked = (
        env.get("RAILYARD_PLACEMENT", "").strip().lower() not in ("", "off")
        or env.get("RAILYARD_EXPERTS")
        or env.get("RAILYARD_ROUTING")
    )
    if (
        asked
        and env.get("RAILYARD_DISABLE", "").strip().lower() in ("", "0", "no", "off", "false")
        and sys.version_info >= (3, 8)
    ):
        from railyard import hook

        hook.start()


def _hand_on():
    here = os.path.dirname(os.path.abspath(__file__))
    # The import system's own modules, which are there in any case; importlib would have to be imported.
    finder = sys.modules["_frozen_importlib_external"].PathFinder
    spec = finder.find_spec(__name__, [p for p in sys.path if os.path.abspath(p or os.curdir) != here])
    if spec is None or spec.loader is None:
        return
    module = sys.modules["_frozen_importlib"].module_from_spec(spec)
    sys.modules[__name__] = module  # what was imported is the other one, as if this one were not there
    spec.loader.exec_module(module)  # its errors are site.py's to show, as ever


try:
    _start()
except Exception as e:
    sys.stderr.write("railyard: the adapter does not start, placement is off: %s: %s\n" % (type(e).__name__, e))
_hand_on()
