// Package chain puts the CNI plugin onto a node and into the chain of the node's network, and takes it out again. It
// never edits a file of somebody else's, and whatever is there at any moment is whole.
package chain

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/google/renameio/v2"
	"golang.org/x/mod/semver"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/lock"
	"github.com/probelet/probelet/daemon/internal/install/runtimes"
	"github.com/probelet/probelet/daemon/internal/statedir"
)

// PluginType is the plugin's type in a network configuration, and the name of its binary.
const PluginType = "probelet"

// Way is how the plugin joins the chain.
type Way string

// Ways.
const (
	// DropIn is a file of its own in the directory that is named after the network (libcni 1.3 and newer).
	DropIn Way = "dropin"
	// Copy is a copy of the primary network's configuration, with the plugin in it, under a name that sorts first.
	Copy Way = "copy"
)

// BestWay is the better one that all runtimes are known to understand.
func BestWay(all runtimes.List) Way {
	if all.ReadDropIns() {
		return DropIn
	}
	return Copy
}

// Node is where CNI keeps its files.
type Node struct {
	NetDir string // of network configurations
	BinDir string // of plugins
	// StateDir is where whoever changes the two directories takes a lock.
	StateDir string
	// Conf are the plugin's own fields in the configuration, beside its type.
	Conf map[string]string
	Log  *slog.Logger
	// Looked, if set, is told by Follow after each look how the plugin is in the chain, or why it is not.
	Looked func(Joined, error)
	// Runtimes finds the node's runtimes, whose configuration says where they look for plugins. nil: none is asked.
	Runtimes func() runtimes.List
	// proc is where the host's processes are; empty: /proc.
	proc string
}

// What may be otherwise in a moment.
var (
	// ErrNoNetwork: there is no network configuration.
	ErrNoNetwork = errors.New("no network configuration")
	// ErrUnusable: the one that there is cannot be read.
	ErrUnusable = errors.New("not a network configuration")
	// ErrUnsupported: it can, but the plugin would keep its pods from starting.
	ErrUnsupported = errors.New("the plugin cannot be in this network")
)

// network is the configuration that the runtime takes: the first one that it can read.
type network struct {
	file    string // name in NetDir
	name    string
	members map[string]json.RawMessage
	plugins []json.RawMessage
	// inlinedOnly: drop-in files are not read.
	inlinedOnly bool
	// unsupported is why the plugin cannot be in it; nil if it can.
	unsupported error
}

// derivedFrom is the member of a copy that says what it is a copy of.
const derivedFrom = "probelet.dev/derivedFrom"

// copyNames are those that a copy may have: the first one that sorts before what it is a copy of.
var copyNames = []string{"00-probelet.conflist", "00-0-probelet.conflist", "!00-probelet.conflist"}

const dropInName = "10-probelet.conf"

// primary finds the network that the runtime would take without us. The first file is it, or nothing: a runtime may take
// the next one if that cannot be used, but more often its owner is just writing it.
func (n Node) primary() (*network, error) {
	entries, err := os.ReadDir(n.NetDir) // sorted
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, e := range entries {
		if e.IsDir() || !slices.Contains([]string{".conf", ".conflist", ".json"}, filepath.Ext(e.Name())) {
			continue
		}
		text, err := os.ReadFile(filepath.Join(n.NetDir, e.Name()))
		if _, link := os.Lstat(filepath.Join(n.NetDir, e.Name())); errors.Is(err, fs.ErrNotExist) && link != nil {
			continue // renamed or removed meanwhile, which somebody will tell of
		}
		if err != nil { // such as: a link that leads nowhere from here; the runtime may see more
			return nil, fmt.Errorf("%w: %w", ErrUnusable, err)
		}
		found, err := parse(e.Name(), text)
		if err != nil {
			return nil, fmt.Errorf("%s: %w: %w", filepath.Join(n.NetDir, e.Name()), ErrUnusable, err)
		}
		if _, ours := found.members[derivedFrom]; ours {
			continue
		}
		found.file = e.Name()
		return found, nil
	}
	return nil, fmt.Errorf("%w in %s", ErrNoNetwork, n.NetDir)
}

// parse reads a configuration as libcni does, for whom the file's name decides: a .conflist is a list of plugins, any other
// a single plugin's configuration, which becomes a list. What libcni refuses is refused.
func parse(file string, text []byte) (*network, error) {
	n := &network{file: file}
	if err := json.Unmarshal(text, &n.members); err != nil {
		return nil, err
	}
	if err := json.Unmarshal(n.members["name"], &n.name); err != nil || n.name == "" {
		return nil, errors.New("name: must be set")
	}
	var err error
	if filepath.Ext(file) == ".conflist" {
		err = n.parseList(text)
	} else {
		err = n.parseSingle(text)
	}
	if err == nil && n.unsupported == nil {
		n.unsupported = n.tooOld()
	}
	return n, err
}

func (w *network) parseSingle(text []byte) error {
	if _, err := libcni.NetworkPluginConfFromBytes(text); err != nil {
		return err
	}
	single := map[string]json.RawMessage{"name": w.members["name"]}
	if version, ok := w.members["cniVersion"]; ok {
		single["cniVersion"] = version
	}
	w.plugins, w.members = []json.RawMessage{bytes.TrimSpace(text)}, single
	return nil
}

func (w *network) parseList(text []byte) error {
	list, err := libcni.NetworkConfFromBytes(text)
	if err != nil {
		return err
	}
	w.inlinedOnly = list.LoadOnlyInlinedPlugins
	if len(list.Plugins) == 0 {
		w.unsupported = errors.New("plugins: there are none in its own file, so nothing is certain to come before the plugin")
		return nil
	}
	return json.Unmarshal(w.members["plugins"], &w.plugins)
}

// oldestCNI is the oldest version of the CNI specification whose results the plugin reads; before it there was no prevResult.
const oldestCNI = "0.3.0"

func (w *network) tooOld() error {
	var version string
	var versions []string
	_ = json.Unmarshal(w.members["cniVersion"], &version) // of what is no string: none
	_ = json.Unmarshal(w.members["cniVersions"], &versions)
	if slices.ContainsFunc(append(versions, version), func(v string) bool { return semver.Compare("v"+v, "v"+oldestCNI) >= 0 }) {
		return nil
	}
	return fmt.Errorf("cniVersion: %q: must be %s or newer", version, oldestCNI)
}

func pluginType(conf json.RawMessage) string {
	var plugin struct {
		Type string `json:"type"`
	}
	_ = json.Unmarshal(conf, &plugin) // of what is no object: none
	return plugin.Type
}

// has reports whether the plugin is in the network already and not by Join: in its list, or in what one of its plugins delegates to.
func (w *network) has() bool {
	return slices.ContainsFunc(w.plugins, func(conf json.RawMessage) bool { return len(places(conf)) > 0 })
}

func isPlugin(conf json.RawMessage) bool { return pluginType(conf) == PluginType }

// plugin is our entry.
func (n Node) plugin() (json.RawMessage, error) {
	conf := map[string]string{"type": PluginType}
	for name, value := range n.Conf {
		conf[name] = value
	}
	return json.MarshalIndent(conf, "", "  ")
}

// copyFile returns the file that a copy of a network's configuration takes.
func (n Node) copyFile(w *network) (string, error) {
	ours := n.ours()
	for _, name := range copyNames {
		file := filepath.Join(n.NetDir, name)
		_, err := os.Lstat(file)
		if name < w.file && (slices.Contains(ours, file) || errors.Is(err, fs.ErrNotExist)) {
			return file, nil
		}
	}
	return "", fmt.Errorf("%s: no free name sorts before it", filepath.Join(n.NetDir, w.file))
}

// withPlugin is the text of a copy.
func (n Node) withPlugin(w *network) ([]byte, error) {
	entry, err := n.plugin()
	if err != nil {
		return nil, err
	}
	return w.derived(w.file, append(slices.Clone(w.plugins), entry))
}

// derived is the text of a configuration that has these plugins, and is otherwise the network's.
func (w *network) derived(from string, plugins []json.RawMessage) ([]byte, error) {
	members := map[string]any{}
	for member, value := range w.members {
		members[member] = value
	}
	members["plugins"], members[derivedFrom] = plugins, from
	text, err := json.MarshalIndent(members, "", "  ")
	return append(text, '\n'), err
}

// throughOther returns the network that a copy of ours is of, and that copy, if the primary network, such as Multus', takes its own from
// it: by its path, or because what was in it has been copied. Then the copy must stay, under its name, and as its original is. The error is
// ErrUnusable if the path of a copy is in the network and its original cannot be read, as while its owner writes it.
func (n Node) throughOther(w *network) (original *network, copied string, err error) {
	if !w.has() || slices.ContainsFunc(w.plugins, isPlugin) {
		return nil, "", nil
	}
	for _, file := range n.ours() {
		original, err := n.original(file)
		switch {
		case err != nil && w.names(file):
			return nil, "", fmt.Errorf("%s: %w: it takes its network from %s: %w", filepath.Join(n.NetDir, w.file), ErrUnusable, file, err)
		case err == nil && original.file != w.file:
			return original, file, nil
		}
	}
	return nil, "", nil
}

// original returns the network that a copy is of, if the plugin can be in it.
func (n Node) original(copied string) (*network, error) {
	found, err := read(copied)
	if err != nil {
		return nil, err
	}
	var from string
	if err := json.Unmarshal(found.members[derivedFrom], &from); err != nil || filepath.Base(from) != from {
		return nil, fmt.Errorf("%s: %s: no file's name", copied, derivedFrom)
	}
	w, err := read(filepath.Join(n.NetDir, from))
	if err == nil && (w.members[derivedFrom] != nil || w.has()) {
		err = fmt.Errorf("%s has the plugin itself", filepath.Join(n.NetDir, from))
	}
	if err != nil {
		return nil, err
	}
	return w, w.unsupported
}

func read(file string) (*network, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	w, err := parse(filepath.Base(file), text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return w, nil
}

// Joined says how the plugin is in the chain.
type Joined struct {
	Way     Way    // empty: by somebody else's hand
	Network string // its name
	Primary string // the file of its configuration
	File    string // ours; empty with Way
	Changed bool   // just now
}

// Join puts the plugin into the chain of the primary network, or adapts what is there to how that is now. The error is
// ErrNoNetwork if there is none, ErrUnsupported if the plugin cannot be in it, and ErrMisplaced if the runtime would not find the
// plugin; then nothing of ours is left either, lest a network outlive its configuration or its pods do not start. It is ErrUnusable if that cannot be read; then everything stays as it is.
func (n Node) Join(ctx context.Context, way Way) (Joined, error) {
	locked, err := n.lock(ctx)
	if err != nil {
		return Joined{}, err
	}
	defer locked.Release()
	w, j, err := n.joinable()
	if err == nil {
		err = n.findable(w)
	}
	if err != nil {
		if errors.Is(err, ErrNoNetwork) || errors.Is(err, ErrUnsupported) || errors.Is(err, ErrMisplaced) {
			_, left := n.leaveBut("")
			err = errors.Join(err, left)
		}
		return Joined{}, err
	}
	p, err := n.plan(w, way, j)
	if err != nil {
		return p.Joined, err
	}
	if p.File != "" {
		if p.Changed, err = n.put(p.File, p.text, p.like); err != nil {
			return p.Joined, err
		}
	}
	left, err := n.leaveBut(p.File)
	p.Changed = p.Changed || left
	return p.Joined, err
}

// hasDropIn reports whether the plugin is in a drop-in of the network by somebody's hand.
func (n Node) hasDropIn(w *network) bool {
	files, _ := filepath.Glob(filepath.Join(n.NetDir, w.name, "*.conf"))
	ours := n.ours()
	return w.readsDropIns() && slices.ContainsFunc(files, func(file string) bool {
		text, err := os.ReadFile(file)
		return err == nil && isPlugin(text) && !slices.Contains(ours, file)
	})
}

// readsDropIns is whether a runtime that knows drop-ins looks for those of this network: they are of lists only.
func (w *network) readsDropIns() bool { return !w.inlinedOnly && filepath.Ext(w.file) == ".conflist" }

// joinable returns the primary network, if the plugin can be in it.
func (n Node) joinable() (w *network, j Joined, err error) {
	if w, err = n.primary(); err != nil {
		return nil, j, err
	}
	j = Joined{Network: w.name, Primary: filepath.Join(n.NetDir, w.file)}
	if w.unsupported != nil {
		err = fmt.Errorf("%s: %w: %w", j.Primary, ErrUnsupported, w.unsupported)
	}
	return w, j, err
}

// Look finds out how the plugin is in the chain of the primary network, and changes nothing. in is whether it is there as Join
// would have it. The errors are Join's.
func (n Node) Look() (j Joined, in bool, err error) {
	w, j, err := n.joinable()
	if err == nil {
		err = n.findable(w)
	}
	if err != nil {
		return j, false, err
	}
	if original, file, err := n.throughOther(w); err != nil {
		return j, false, err
	} else if original != nil {
		j.Way, j.File = Copy, file
		return j, n.isCopy(file, original), nil
	}
	if w.has() || n.hasDropIn(w) {
		return j, true, nil
	}
	for _, file := range n.ours() {
		if filepath.Dir(file) == filepath.Clean(n.NetDir) {
			j.Way, j.File = Copy, file
			return j, n.isCopy(file, w), nil
		}
		if file == filepath.Join(n.NetDir, w.name, dropInName) {
			j.Way, j.File = DropIn, file
			return j, w.readsDropIns(), nil
		}
	}
	return j, false, nil
}

// isCopy is whether a copy comes before its original, and has what that has now. Our own fields may be others.
func (n Node) isCopy(file string, w *network) bool {
	text, err := os.ReadFile(file)
	if err != nil || filepath.Base(file) >= w.file {
		return false
	}
	found, err := parse(file, text)
	if err != nil || len(found.plugins) != len(w.plugins)+1 {
		return false
	}
	delete(found.members, derivedFrom)
	found.members["plugins"], w.members["plugins"] = nil, nil
	same := func(a, b json.RawMessage) bool {
		var x, y bytes.Buffer
		return json.Compact(&x, a) == nil && json.Compact(&y, b) == nil && bytes.Equal(x.Bytes(), y.Bytes())
	}
	return slices.EqualFunc(found.plugins[:len(w.plugins)], w.plugins, same) &&
		maps.EqualFunc(found.members, w.members, func(a, b json.RawMessage) bool { return a == nil && b == nil || same(a, b) })
}

// lockDeadline bounds the wait for another process that changes the chain, which takes a moment.
const lockDeadline = 10 * time.Second

// lock keeps other processes from changing the chain or the plugin's binary, until it is released.
func (n Node) lock(ctx context.Context) (*lock.Lock, error) {
	ctx, cancel := context.WithTimeout(ctx, lockDeadline)
	defer cancel()
	return statedir.LockChain(ctx, n.StateDir)
}

// writeFile replaces a file, whole and for good: also should the machine lose its power now. owner, if not nil, is a file
// whose owner it has.
func writeFile(file string, text []byte, mode fs.FileMode, owner fs.FileInfo) error {
	dir := filepath.Dir(file)
	// Beside the file: a runtime sees a file that is renamed within the directory, not one that comes from elsewhere.
	f, err := renameio.NewPendingFile(file, renameio.WithTempDir(dir), renameio.WithStaticPermissions(mode))
	if err != nil {
		return err
	}
	defer f.Cleanup() //nolint:errcheck // nothing is left but after an error
	if owner != nil {
		if err := f.Chown(ownerOf(owner)); err != nil {
			return err
		}
	}
	if _, err := f.Write(text); err != nil {
		return err
	}
	if err := f.CloseAtomicallyReplace(); err != nil {
		return err
	}
	return syncDir(dir)
}

func ownerOf(info fs.FileInfo) (uid, gid int) {
	stat := info.Sys().(*syscall.Stat_t)
	return int(stat.Uid), int(stat.Gid)
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	err = f.Sync()
	if errors.Is(err, unix.EINVAL) { // a file system that has nothing to be synced
		err = nil
	}
	return errors.Join(err, f.Close())
}

// put writes a file if it does not have that text, and has the runtime read it. It gets the mode and the owner of like.
func (n Node) put(file string, text []byte, like fs.FileInfo) (changed bool, err error) {
	if isAs(file, text, like) {
		return false, nil
	}
	if dir := filepath.Dir(file); dir != n.NetDir {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return false, err
		}
		if err := syncDir(n.NetDir); err != nil {
			return false, err
		}
	}
	mode := fs.FileMode(0o644)
	if like != nil {
		mode = like.Mode().Perm()
	}
	if err := writeFile(file, text, mode, like); err != nil {
		return false, err
	}
	return true, n.Wake()
}

// isAs reports whether a file has that text, and the mode and the owner of like.
func isAs(file string, text []byte, like fs.FileInfo) bool {
	old, err := os.ReadFile(file)
	if err != nil || !bytes.Equal(old, text) {
		return false
	}
	if like == nil {
		return true
	}
	info, err := os.Stat(file)
	if err != nil || info.Mode().Perm() != like.Mode().Perm() {
		return false
	}
	uid, gid := ownerOf(info)
	wantUID, wantGID := ownerOf(like)
	return uid == wantUID && gid == wantGID
}

// bell begins the name of the file that comes and goes to wake the runtime.
const bell = "." + PluginType

// Wake makes the runtime read its configuration again: it watches NetDir, and not the directories in it.
func (n Node) Wake() error {
	f, err := os.CreateTemp(n.NetDir, bell)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // nothing to be read
	}
	if err != nil {
		return err
	}
	err = errors.Join(f.Close(), os.Remove(f.Name()))
	if errors.Is(err, fs.ErrNotExist) { // somebody has cleaned up
		return nil
	}
	return err
}

// Leave takes the plugin out of the chain. changed is whether it was in there.
func (n Node) Leave(ctx context.Context) (changed bool, err error) {
	locked, err := n.lock(ctx)
	if err != nil {
		return false, err
	}
	defer locked.Release()
	changed, err = n.leaveBut("")
	// The directory for a drop-in, if making or removing that was interrupted.
	if w, err := n.primary(); err == nil && filepath.Base(w.name) == w.name {
		n.removeEmpty(filepath.Join(n.NetDir, w.name))
	}
	return changed, err
}

// leaveBut removes all files of ours but one, and what writing them left when it was interrupted. A copy by whose path another
// plugin finds its network, as Multus does, stays, without the plugin: no pod could start if it were gone.
func (n Node) leaveBut(keep string) (changed bool, err error) {
	var errs []error
	for _, file := range n.ours() {
		if file == keep {
			continue
		}
		if named, err := n.isNamed(file); err != nil {
			errs = append(errs, err)
			continue
		} else if named {
			disarmed, err := n.disarm(file)
			changed, errs = changed || disarmed, append(errs, err)
			continue
		}
		if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
			continue
		}
		changed = true
		n.removeEmpty(filepath.Dir(file))
	}
	for _, pattern := range n.interrupted() {
		errs = append(errs, removeAll(pattern))
	}
	if changed {
		errs = append(errs, syncDir(n.NetDir), n.Wake())
	}
	return changed, errors.Join(errs...)
}

// disarm takes the plugin out of a copy.
func (n Node) disarm(file string) (changed bool, err error) {
	w, err := read(file)
	if err != nil {
		return false, err
	}
	var from string
	plugins := slices.DeleteFunc(slices.Clone(w.plugins), isPlugin)
	if err := json.Unmarshal(w.members[derivedFrom], &from); err != nil || len(plugins) == len(w.plugins) {
		return false, err
	}
	text, err := w.derived(from, plugins)
	if err != nil {
		return false, err
	}
	like, err := os.Stat(file)
	if err != nil {
		return false, err
	}
	return n.put(file, text, like)
}

// interrupted are patterns of the files that writing in NetDir leaves when it is interrupted.
func (n Node) interrupted() []string {
	patterns := []string{
		filepath.Join(n.NetDir, bell+"[0-9]*"), filepath.Join(n.NetDir, "*", "."+dropInName+"[0-9]*"),
	}
	for _, name := range copyNames {
		patterns = append(patterns, filepath.Join(n.NetDir, "."+name+"[0-9]*"))
	}
	return patterns
}

// removeAll removes the files that a pattern matches.
func removeAll(pattern string) error {
	files, err := filepath.Glob(pattern)
	errs := []error{err}
	for _, file := range files {
		if err := os.Remove(file); !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// removeEmpty removes a network's directory if nobody has a file in it.
func (n Node) removeEmpty(dir string) {
	if dir != n.NetDir {
		_ = os.Remove(dir)
	}
}

// ours are the files that Join has made.
func (n Node) ours() []string {
	var files []string
	for _, name := range copyNames {
		file := filepath.Join(n.NetDir, name)
		text, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		// One that is not whole was not written by us, who never leave one.
		if found, err := parse(name, text); err == nil && found.members[derivedFrom] != nil {
			files = append(files, file)
		}
	}
	dropIns, _ := filepath.Glob(filepath.Join(n.NetDir, "*", dropInName))
	for _, file := range dropIns {
		if text, err := os.ReadFile(file); err == nil && pluginType(text) == PluginType {
			files = append(files, file)
		}
	}
	return files
}

// PutPlugin puts the plugin's binary where the runtime finds it. changed is whether it was not there, or another one.
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

// removeInterrupted removes what writing the binary left when it was interrupted.
func (n Node) removeInterrupted() error {
	return removeAll(filepath.Join(n.BinDir, "."+PluginType+"[0-9]*"))
}

// HasPlugin is whether the binary is there.
func (n Node) HasPlugin() bool {
	_, err := os.Lstat(n.pluginFile())
	return err == nil
}

// RemovePlugin removes the binary. It takes no lock, because the state directory is gone by then.
func (n Node) RemovePlugin() error {
	if err := os.Remove(n.pluginFile()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return n.removeInterrupted()
}

func (n Node) pluginFile() string { return filepath.Join(n.BinDir, PluginType) }

func (j Joined) String() string {
	if j.Way == "" {
		return fmt.Sprintf("network %s (%s) has the plugin in its own configuration", j.Network, j.Primary)
	}
	return fmt.Sprintf("network %s (%s), by %s", j.Network, j.Primary, strings.TrimPrefix(string(j.Way)+" "+j.File, " "))
}
