from train.runtime.runner import command_line
from train.teacher import program

# What --help shows.
__doc__ = program.__doc__

if __name__ == '__main__':
    command_line(program.main, 'configs/teacher.py')
