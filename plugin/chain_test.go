package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/probelet/probelet/bpf/attach"
)

// conflist returns a network configuration list named "net".
func conflist(types ...string) string {
	return listNamed("net", types...)
}

func listNamed(name string, types ...string) string {
	var plugins []string
	for _, t := range types {
		plugins = append(plugins, `{"type": "`+t+`", "ipam": {"type": "host-local"}}`)
	}
	return `{"cniVersion": "1.1.0", "name": "` + name + `", "plugins": [` + strings.Join(plugins, ", ") + `]}`
}

func TestAttachVia(t *testing.T) {
	tests := map[string]struct {
		files map[string]string // by path; a text that begins with "-> " is the target of a symbolic link
		want  attach.Via
	}{
		"no files":                     {nil, attach.ViaAuto},
		"no followers":                 {map[string]string{"10.conflist": conflist("ptp", "probelet")}, attach.ViaClsact},
		"all before":                   {map[string]string{"10.conflist": conflist("ptp", "bandwidth", "unknown", "probelet")}, attach.ViaClsact},
		"qdiscless ones follow":        {map[string]string{"10.conflist": conflist("ptp", "probelet", "portmap", "tuning", "sbr", "vrf", "firewall")}, attach.ViaClsact},
		"bandwidth follows":            {map[string]string{"10.conflist": conflist("ptp", "probelet", "bandwidth")}, attach.ViaTCX},
		"bandwidth follows later":      {map[string]string{"10.conflist": conflist("ptp", "probelet", "portmap", "unknown", "bandwidth")}, attach.ViaTCX},
		"an unknown plugin follows":    {map[string]string{"10.conflist": conflist("ptp", "probelet", "unknown")}, attach.ViaAuto},
		"ours twice":                   {map[string]string{"10.conflist": conflist("ptp", "probelet", "bandwidth", "probelet")}, attach.ViaTCX},
		"ours is not in the chain":     {map[string]string{"10.conflist": conflist("ptp", "portmap")}, attach.ViaAuto},
		"another network":              {map[string]string{"10.conflist": listNamed("other", "ptp", "probelet")}, attach.ViaAuto},
		"bandwidth in another network": {map[string]string{"05.conflist": listNamed("other", "ptp", "probelet", "bandwidth"), "10.conflist": conflist("ptp", "probelet")}, attach.ViaClsact},
		"a name with the same prefix":  {map[string]string{"10.conflist": listNamed("net2", "ptp", "probelet")}, attach.ViaAuto},
		"the copy of an original":      {map[string]string{"00-probelet.conflist": conflist("ptp", "bandwidth", "probelet"), "10.conflist": conflist("ptp", "bandwidth")}, attach.ViaClsact},
		"two lists, bandwidth in":      {map[string]string{"00.conflist": conflist("ptp", "probelet"), "10.conflist": conflist("ptp", "probelet", "bandwidth")}, attach.ViaTCX},
		"two lists, reversed":          {map[string]string{"00.conflist": conflist("ptp", "probelet", "bandwidth"), "10.conflist": conflist("ptp", "probelet")}, attach.ViaTCX},
		"a list in a .conf":            {map[string]string{"10.conf": conflist("ptp", "probelet")}, attach.ViaAuto},
		"a list in a .json":            {map[string]string{"10.json": conflist("ptp", "probelet")}, attach.ViaAuto},
		"a single plugin":              {map[string]string{"10.conf": `{"cniVersion": "1.0.0", "name": "net", "type": "probelet"}`}, attach.ViaAuto},
		"disabled by its extension":    {map[string]string{"10.conflist.bak": conflist("ptp", "probelet"), "10.CONFLIST": conflist("ptp", "probelet")}, attach.ViaAuto},
		"broken":                       {map[string]string{"10.conflist": conflist("ptp", "probelet")[:40]}, attach.ViaAuto},
		"empty":                        {map[string]string{"10.conflist": ""}, attach.ViaAuto},
		"a type that is a number":      {map[string]string{"10.conflist": `{"name": "net", "plugins": [{"type": "probelet"}, {"type": 1}]}`}, attach.ViaAuto},
		"an array":                     {map[string]string{"10.conflist": `[` + conflist("ptp", "probelet") + `]`}, attach.ViaAuto},
		"no plugins":                   {map[string]string{"10.conflist": `{"name": "net"}`}, attach.ViaAuto},
		"null plugins":                 {map[string]string{"10.conflist": `{"name": "net", "plugins": [null, {"type": "probelet"}, null]}`}, attach.ViaAuto},
		"a broken file beside it":      {map[string]string{"05.conflist": `{`, "10.conflist": conflist("ptp", "probelet")}, attach.ViaClsact},
		"a directory beside it":        {map[string]string{"05.conflist/x": "", "10.conflist": conflist("ptp", "probelet")}, attach.ViaClsact},
		"a directory in its place":     {map[string]string{"10.conflist/10.conflist": conflist("ptp", "probelet")}, attach.ViaAuto},
		"behind a link":                {map[string]string{"elsewhere/a": conflist("ptp", "probelet"), "10.conflist": "-> elsewhere/a"}, attach.ViaClsact},
		"behind a link, bandwidth":     {map[string]string{"elsewhere/a": conflist("ptp", "probelet", "bandwidth"), "10.conflist": "-> elsewhere/a"}, attach.ViaTCX},
		"a link to nothing":            {map[string]string{"10.conflist": "-> nowhere"}, attach.ViaAuto},
		"a link to itself":             {map[string]string{"10.conflist": "-> 10.conflist"}, attach.ViaAuto},
		"dropped in":                   {map[string]string{"10.conflist": conflist("ptp"), "net/10-probelet.conf": `{"type": "probelet"}`}, attach.ViaClsact},
		"dropped in last":              {map[string]string{"10.conflist": conflist("ptp"), "net/05.conf": `{"type": "bandwidth"}`, "net/10.conf": `{"type": "probelet"}`}, attach.ViaClsact},
		"dropped in, bandwidth too":    {map[string]string{"10.conflist": conflist("ptp"), "net/10.conf": `{"type": "probelet"}`, "net/20.conf": `{"type": "bandwidth"}`}, attach.ViaTCX},
		"inlined, bandwidth dropped":   {map[string]string{"10.conflist": conflist("ptp", "probelet"), "net/20.conf": `{"type": "bandwidth"}`}, attach.ViaTCX},
		"only inlined ones":            {map[string]string{"10.conflist": `{"name": "net", "loadOnlyInlinedPlugins": "true", "plugins": [{"type": "probelet"}]}`}, attach.ViaClsact},
		"all dropped in":               {map[string]string{"10.conflist": `{"name": "net"}`, "net/10.conf": `{"type": "ptp"}`, "net/20.conf": `{"type": "probelet"}`}, attach.ViaClsact},
		"dropped in elsewhere":         {map[string]string{"10.conflist": conflist("ptp"), "other/10.conf": `{"type": "probelet"}`}, attach.ViaAuto},
		"dropped in without a list":    {map[string]string{"net/10.conf": `{"type": "probelet"}`}, attach.ViaAuto},
		"a broken drop-in":             {map[string]string{"10.conflist": conflist("ptp", "probelet"), "net/20.conf": `{"type": "tun`}, attach.ViaAuto},
		"a broken drop-in before":      {map[string]string{"10.conflist": conflist("ptp"), "net/05.conf": `{`, "net/10.conf": `{"type": "probelet"}`}, attach.ViaClsact},
		"a drop-in that is a link":     {map[string]string{"10.conflist": conflist("ptp", "probelet"), "b": `{"type": "bandwidth"}`, "net/20.conf": "-> ../b"}, attach.ViaTCX},
		"drop-ins behind a link":       {map[string]string{"10.conflist": conflist("ptp", "probelet"), "d/20.conf": `{"type": "bandwidth"}`, "net": "-> d"}, attach.ViaTCX},
		"not a drop-in":                {map[string]string{"10.conflist": conflist("ptp", "probelet"), "net/20.conflist": `{"type": "bandwidth"}`, "net/d.conf/x": ""}, attach.ViaClsact},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			netDir := filepath.Join(t.TempDir(), "net.d [*]") // a name that a glob pattern would not match
			for path, text := range test.files {
				writeOrLink(t, filepath.Join(netDir, path), text)
			}
			t.Setenv(netDirVariable, netDir)
			if got := attachVia("net"); got != test.want {
				t.Errorf("via %q, want %q", got, test.want)
			}
		})
	}
}

func writeOrLink(t *testing.T, path, text string) {
	t.Helper()
	err := os.MkdirAll(filepath.Dir(path), 0o755)
	if target, isLink := strings.CutPrefix(text, "-> "); err == nil && isLink {
		err = os.Symlink(target, path)
	} else if err == nil {
		err = os.WriteFile(path, []byte(text), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}
