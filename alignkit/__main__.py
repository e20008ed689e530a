"`python -m alignkit`: the program of `alignkit.cli`, whose page is nbs/14_cli.ipynb. The only module beside __init__ that has no page."
from alignkit.cli import main

if __name__ == "__main__": main()
