package chain

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
)

// PutPlugin copies the plugin's binary from source into BinDir. changed reports whether the binary was missing or different.
func (n Node) PutPlugin(ctx context.Context, source string) (changed bool, err error) {
	program, err := os.ReadFile(source)
	if err != nil {
		return false, err
	}
	locked, err := n.lock(ctx)
	if err != nil {
		return false, err
	}
	defer locked.Release()
	if err := n.removeInterrupted(); err != nil {
		return false, err
	}
	target := n.pluginFile()
	if old, err := os.ReadFile(target); err == nil && bytes.Equal(old, program) {
		return false, os.Chmod(target, 0o755)
	}
	return true, writeFile(target, program, 0o755, nil)
}

// removeInterrupted removes the temporary files of interrupted writes.
func (n Node) removeInterrupted() error {
	return removeAll(filepath.Join(n.BinDir, "."+PluginType+"[0-9]*"))
}

// HasPlugin reports whether the plugin's binary is in BinDir.
func (n Node) HasPlugin() bool {
	_, err := os.Lstat(n.pluginFile())
	return err == nil
}

// RemovePlugin removes the plugin's binary. It takes no lock, because by then the state directory is gone.
func (n Node) RemovePlugin() error {
	if err := os.Remove(n.pluginFile()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return n.removeInterrupted()
}

func (n Node) pluginFile() string { return filepath.Join(n.BinDir, PluginType) }
