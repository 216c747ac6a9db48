package chain

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// Reference is a place in a file, not written by Join, that makes a runtime or another plugin run ours, or read a file of ours.
type Reference struct {
	File  string
	Place string // such as delegates[0].plugins[1].type; empty: the file is no JSON
}

func (r Reference) String() string {
	if r.Place == "" {
		return r.File
	}
	return r.File + ": " + r.Place
}

// maxReferring is the size of the largest file that is looked into, in bytes. Network configurations are far smaller.
const maxReferring = 1 << 20

// References returns all references in NetDir and the directories in it, whatever the files' names: one that was renamed, as
// Cilium does (*.cilium_bak), may be renamed again.
func (n Node) References() (all []Reference, err error) {
	ours := n.ours()
	err = filepath.WalkDir(n.NetDir, func(file string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() || slices.Contains(ours, file) || n.isInterrupted(file) {
			return skipGone(err)
		}
		info, err := os.Stat(file) // of what a link leads to
		if err != nil || !info.Mode().IsRegular() || info.Size() > maxReferring {
			return nil
		}
		text, err := os.ReadFile(file)
		if err != nil {
			return skipGone(err)
		}
		for _, place := range places(text) {
			all = append(all, Reference{file, place})
		}
		return nil
	})
	return all, skipGone(err)
}

// isInterrupted reports whether a file is what writing one of ours left when it was interrupted.
func (n Node) isInterrupted(file string) bool {
	return slices.ContainsFunc(n.interrupted(), func(pattern string) bool {
		matches, _ := filepath.Match(pattern, file)
		return matches
	})
}

func skipGone(err error) error {
	if os.IsNotExist(err) {
		return nil
	}
	return err
}

// places returns the places in a text that refer to the plugin.
func places(text []byte) []string {
	var value any
	if json.Unmarshal(text, &value) != nil {
		if bytes.Contains(text, []byte(`"`+PluginType+`"`)) || namesPlugin.Match(text) {
			return []string{""}
		}
		return nil
	}
	return placesIn(value, "")
}

func placesIn(value any, at string) (all []string) {
	switch v := value.(type) {
	case map[string]any:
		for _, key := range slices.Sorted(maps.Keys(v)) {
			place := strings.TrimPrefix(at+"."+key, ".")
			if text, ok := v[key].(string); ok && (strings.EqualFold(key, "type") && text == PluginType || namesCopy(text) || namesPlugin.MatchString(text)) {
				all = append(all, place)
			}
			all = append(all, placesIn(v[key], place)...)
		}
	case []any:
		for i, one := range v {
			place := fmt.Sprintf("%s[%d]", at, i)
			if text, ok := one.(string); ok && namesCopy(text) {
				all = append(all, place)
			}
			all = append(all, placesIn(one, place)...)
		}
	}
	return all
}

// namesPlugin finds the plugin's type in YAML, and in JSON within a text.
var namesPlugin = regexp.MustCompile(`\btype\\?["']?\s*:\s*\\?["']?` + regexp.QuoteMeta(PluginType) + `(?:[\\"'\s,}\]]|$)`)

// namesCopy reports whether a text is the path of a copy that Join makes, as Multus has it (clusterNetwork).
func namesCopy(text string) bool {
	return filepath.IsAbs(text) && slices.Contains(copyNames, filepath.Base(text))
}
