from train.runtime.runner import command_line
from train.text import program

# Shown by --help.
__doc__ = program.__doc__

if __name__ == '__main__':
    command_line(program.RECIPE.run, 'configs/text.py')
