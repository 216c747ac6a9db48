// Command write writes the container image of the built binaries to a file, for "docker load" or "ctr images import".
package main

import (
	"flag"
	"fmt"
	"os"

	"github.com/probelet/probelet/e2e/harness/image"
)

func main() {
	file := flag.String("o", "probelet-image.tar", "`file` to write")
	reference := flag.String("t", image.Reference, "`name` of the image, with a tag")
	bin := flag.String("bin", "bin", "`directory` of the binaries")
	flag.Parse()
	if err := image.Probelet(*reference, *bin).Write(*file); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
