from train.aot import sizing
from train.runtime.runner import command_line

# Shown by --help.
__doc__ = sizing.__doc__

if __name__ == '__main__':
    sizing.define_flags()
    command_line(sizing.main, 'configs/dmd.py')
