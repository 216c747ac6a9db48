// Package image builds container images of static binaries, without Docker or a registry.
package image

import (
	"archive/tar"
	"bytes"
	"io"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// Image describes an image with a single layer.
type Image struct {
	Reference       string
	Entrypoint, Cmd []string
	Files           []File
}

// File is a file in an image: a copy of Source, a symbolic link to Link or, with neither, a world-writable directory.
type File struct{ Path, Source, Link string }

// Reference is the image reference in the chart's default values.
const Reference = "registry.example/probelet:dev"

// Probelet describes the same image as the Dockerfile, made of the binaries in directory bin.
func Probelet(reference, bin string) Image {
	const dir = "/usr/local/bin/"
	i := Image{Reference: reference, Entrypoint: []string{dir + "probeletd"}}
	for _, binary := range []string{"probelet", "probeletd", "probeletctl"} {
		i.Files = append(i.Files, File{Path: dir + binary, Source: filepath.Join(bin, binary)})
	}
	return i
}

// searchPath is the PATH in every image.
const searchPath = "PATH=/usr/local/bin:/usr/bin:/bin"

// Write writes the image to a file that containerd and Docker can import.
func (i Image) Write(file string) error {
	tag, err := name.NewTag(i.Reference)
	if err != nil {
		return err
	}
	text, err := i.layer()
	if err != nil {
		return err
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(text)), nil })
	if err != nil {
		return err
	}
	image, err := mutate.AppendLayers(empty.Image, layer)
	if err != nil {
		return err
	}
	config, err := image.ConfigFile()
	if err != nil {
		return err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", runtime.GOARCH
	config.Config = v1.Config{Entrypoint: i.Entrypoint, Cmd: i.Cmd, Env: []string{searchPath}}
	if image, err = mutate.ConfigFile(image, config); err != nil {
		return err
	}
	return tarball.WriteToFile(file, tag, image)
}

func (i Image) layer() ([]byte, error) {
	var layer bytes.Buffer
	archive := tar.NewWriter(&layer)
	for _, f := range i.Files {
		if err := f.add(archive); err != nil {
			return nil, err
		}
	}
	return layer.Bytes(), archive.Close()
}

func (f File) add(archive *tar.Writer) error {
	header := &tar.Header{Name: strings.TrimPrefix(path.Clean(f.Path), "/"), Mode: 0o755, Typeflag: tar.TypeReg}
	var contents []byte
	switch {
	case f.Link != "":
		header.Typeflag, header.Linkname = tar.TypeSymlink, f.Link
	case f.Source == "":
		header.Typeflag, header.Mode = tar.TypeDir, 0o1777
	default:
		var err error
		if contents, err = os.ReadFile(f.Source); err != nil {
			return err
		}
		header.Size = int64(len(contents))
	}
	if err := archive.WriteHeader(header); err != nil {
		return err
	}
	_, err := archive.Write(contents)
	return err
}
