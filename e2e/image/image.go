// Package image makes container images of static binaries, without Docker and without a registry.
package image

import (
	"archive/tar"
	"bytes"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// Reference is the image of the chart's default values.
const Reference = "registry.example/probelet:dev"

// WriteProbelet writes the image that the Dockerfile describes, of binaries in directory bin.
func WriteProbelet(file, reference, bin string) error {
	const dir = "/usr/local/bin"
	return Write(file, reference, dir, []string{dir + "/probeletd"},
		filepath.Join(bin, "probelet"), filepath.Join(bin, "probeletd"), filepath.Join(bin, "probeletctl"))
}

// Write writes an image into a file that containerd and Docker import: the binaries, in directory dir of the image, and
// the command that runs if nothing else is said.
func Write(file, reference, dir string, entrypoint []string, binaries ...string) error {
	tag, err := name.NewTag(reference)
	if err != nil {
		return err
	}
	var layer bytes.Buffer
	archive := tar.NewWriter(&layer)
	for _, binary := range binaries {
		if err := add(archive, dir, binary); err != nil {
			return err
		}
	}
	if err := archive.Close(); err != nil {
		return err
	}
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(layer.Bytes())), nil })
	if err != nil {
		return err
	}
	image, err := mutate.AppendLayers(empty.Image, l)
	if err != nil {
		return err
	}
	config, err := image.ConfigFile()
	if err != nil {
		return err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", runtime.GOARCH
	config.Config = v1.Config{Entrypoint: entrypoint, Env: []string{"PATH=/" + strings.TrimPrefix(dir, "/")}}
	if image, err = mutate.ConfigFile(image, config); err != nil {
		return err
	}
	return tarball.WriteToFile(file, tag, image)
}

func add(archive *tar.Writer, dir, binary string) error {
	program, err := os.ReadFile(binary)
	if err != nil {
		return err
	}
	header := &tar.Header{
		Name: strings.TrimPrefix(filepath.Join(dir, filepath.Base(binary)), "/"),
		Mode: 0o755, Size: int64(len(program)), Typeflag: tar.TypeReg,
	}
	if err := archive.WriteHeader(header); err != nil {
		return err
	}
	_, err = archive.Write(program)
	return err
}
