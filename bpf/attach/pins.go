package attach

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/probelet/probelet/bpf/datapath"
)

// Names of pins.
const (
	pinSteer   = "steer"
	pinObserve = "observe"
	pinRespond = "respond"
)

// deviceName returns the name of the directory that identifies the attached device. It is a directory because bpffs holds no files
// but pins.
func deviceName(key datapath.DeviceKey) string {
	return fmt.Sprintf("device-%d-%d", key.Ifindex, key.Generation)
}

// deviceIn returns the device that was attached under dir. The error is os.ErrNotExist if no directory identifies one.
func deviceIn(dir string) (key datapath.DeviceKey, err error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return key, err
	}
	for _, e := range entries {
		if n, _ := fmt.Sscanf(e.Name(), "device-%d-%d", &key.Ifindex, &key.Generation); n == 2 {
			return key, nil
		}
	}
	return key, fmt.Errorf("%s names no device: %w", dir, os.ErrNotExist)
}

// Device returns the key of the device that is attached under an ID. The error is os.ErrNotExist if there is none.
func Device(bpfDir string, id ID) (datapath.DeviceKey, error) {
	return deviceIn(filepath.Join(datapath.AttachmentsDir(bpfDir), id.name()))
}

// OpenPod returns the state of an attachment's pod. The error is os.ErrNotExist if nothing is attached under the ID.
func OpenPod(d *datapath.Datapath, bpfDir string, id ID) (*datapath.Pod, error) {
	key, err := Device(bpfDir, id)
	if err != nil {
		return nil, err
	}
	return d.Pod(key)
}

// List returns all pinned attachments, complete or not, of every build.
func List(bpfDir string) ([]ID, error) {
	others, err := datapath.Others(bpfDir)
	if err != nil {
		return nil, err
	}
	var ids []ID
	seen := map[ID]bool{}
	for _, dir := range append(others, filepath.Dir(datapath.AttachmentsDir(bpfDir))) {
		entries, err := os.ReadDir(datapath.AttachmentsIn(dir))
		if err != nil && !datapath.Absent(err) {
			return nil, err
		}
		for _, e := range entries {
			if id, ok := parseName(e.Name()); ok && !seen[id] {
				seen[id] = true
				ids = append(ids, id)
			}
		}
	}
	return ids, nil
}

// dirsOf returns the directories where an attachment may be pinned. The one for this build's ABI comes last.
func dirsOf(bpfDir string, id ID) ([]string, error) {
	others, err := datapath.Others(bpfDir)
	var dirs []string
	for _, other := range others {
		dirs = append(dirs, filepath.Join(datapath.AttachmentsIn(other), id.name()))
	}
	return append(dirs, filepath.Join(datapath.AttachmentsDir(bpfDir), id.name())), err
}

// isOurs reports whether the attachment pinned in dir has this build's ABI.
func isOurs(bpfDir, dir string) bool { return filepath.Dir(dir) == datapath.AttachmentsDir(bpfDir) }

// indexIn returns the index of the device that was attached under dir. It returns 0 if there was none, or if an older build attached it
// and it is gone.
func indexIn(dir string) (int, error) {
	key, err := deviceIn(dir)
	if errors.Is(err, os.ErrNotExist) { // ABI v3 and older, which always attached XDP
		return xdpDevice(filepath.Join(dir, pinRespond))
	}
	return int(key.Ifindex), err
}

// remove removes a pin or a marker. It is no error if it is missing.
func remove(path string) error {
	if err := os.Remove(path); err != nil && !datapath.Absent(err) {
		return err
	}
	return nil
}
