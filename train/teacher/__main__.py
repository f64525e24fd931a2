from train.runtime.runner import command_line
from train.teacher import program

# Shown by --help.
__doc__ = program.__doc__

if __name__ == '__main__':
    command_line(program.RECIPE.run, 'configs/teacher.py')
