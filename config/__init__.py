"""Every knob of a run: base.py documents all keys, tiny.py runs anywhere, dgx.py holds the paper's runs."""
