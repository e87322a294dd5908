from vreflection.cli import main

main()
