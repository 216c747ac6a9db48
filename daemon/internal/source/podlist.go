package source

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"

	corev1 "k8s.io/api/core/v1"
	kubejson "sigs.k8s.io/json"
)

// readPodList reads exactly one PodList, holding no more than one of its pods in memory. It may call each for some pods
// before it finds the list to be invalid.
func readPodList(r io.Reader, each func(*corev1.Pod)) error {
	d := json.NewDecoder(r)
	if err := expect(d, json.Delim('{')); err != nil {
		return err
	}
	var kind string
	items := 0
	for d.More() {
		key, err := d.Token()
		if err != nil {
			return err
		}
		switch key {
		case "kind":
			err = d.Decode(&kind)
		case "items":
			items, err = readItems(d, each)
		default:
			var ignored json.RawMessage
			err = d.Decode(&ignored)
		}
		if err != nil {
			return fmt.Errorf("%v: %w", key, unexpected(err))
		}
	}
	if err := expect(d, json.Delim('}')); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("more than one JSON value")
	}
	if kind != "PodList" {
		return fmt.Errorf("kind: %q with %d items: must be PodList", kind, items)
	}
	return nil
}

func expect(d *json.Decoder, want json.Delim) error {
	got, err := d.Token()
	if err == nil && got != want {
		err = fmt.Errorf("got %v, expected %v", got, want)
	}
	return unexpected(err)
}

// unexpected turns io.EOF into io.ErrUnexpectedEOF, because the JSON value is incomplete.
func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

func readItems(d *json.Decoder, each func(*corev1.Pod)) (int, error) {
	start, err := d.Token()
	if err != nil || start == nil { // null: no pods
		return 0, err
	}
	if start != json.Delim('[') {
		return 0, fmt.Errorf("got %v, expected a list", start)
	}
	n := 0
	var raw json.RawMessage
	for ; d.More(); n++ {
		if err := d.Decode(&raw); err != nil {
			return n, err
		}
		var pod corev1.Pod
		// Like Kubernetes: case matters, and unknown fields of later versions are ignored.
		if err := kubejson.UnmarshalCaseSensitivePreserveInts(raw, &pod); err != nil {
			return n, fmt.Errorf("[%d]: %w", n, err)
		}
		if pod.Name == "" || pod.Namespace == "" {
			return n, fmt.Errorf("[%d]: a pod without name or namespace", n)
		}
		each(&pod)
	}
	_, err = d.Token()
	return n, err
}
