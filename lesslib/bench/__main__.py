from lesslib.bench.benchmarks import main

if __name__ == "__main__":
    main()
