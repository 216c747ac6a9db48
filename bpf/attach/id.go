package attach

import (
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// ID identifies an attachment by the pod's container ID and interface, as CNI does.
type ID struct {
	ContainerID string
	IfName      string
}

// The name of an ID on disk escapes dots, which bpffs reserves. The first "@" ends the container ID, which cannot contain one
// (CNI spec, section 2).
var (
	escape   = strings.NewReplacer("%", "%25", ".", "%2E", "/", "%2F")
	unescape = strings.NewReplacer("%25", "%", "%2E", ".", "%2F", "/")
)

func (id ID) name() string { return escape.Replace(id.ContainerID) + "@" + escape.Replace(id.IfName) }

func parseName(name string) (ID, bool) {
	container, ifName, ok := strings.Cut(name, "@")
	return ID{unescape.Replace(container), unescape.Replace(ifName)}, ok
}

func (id ID) String() string { return id.ContainerID + "/" + id.IfName }

// maxName is the longest name of an attachment, in bytes. Its longest file name must fit into NAME_MAX, 255 bytes. That is the name
// of a record being written, where renameio puts a dot in front and up to 19 digits after ".json".
const maxName = unix.NAME_MAX - len("..json") - 19

// Check returns an error if the ID is too long for file names.
func (id ID) Check() error {
	if name := id.name(); len(name) > maxName {
		return fmt.Errorf("container ID of %d characters is too long: it makes a file name of %d bytes, at most %d are possible",
			len(id.ContainerID), len(name), maxName)
	}
	return nil
}
