from clinometer.cli import main

main()
