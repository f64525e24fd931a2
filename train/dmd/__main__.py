from train.dmd import program
from train.runtime.runner import command_line

# Shown by --help.
__doc__ = program.__doc__

if __name__ == '__main__':
    command_line(program.RECIPE.run, 'configs/dmd.py')
