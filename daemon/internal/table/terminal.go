package table

import (
	"os"

	"golang.org/x/term"
)

// WidthOf returns the width of a terminal in characters, or 0 if f is not a terminal.
func WidthOf(f *os.File) int {
	width, _, err := term.GetSize(int(f.Fd()))
	if err != nil {
		return 0
	}
	return width
}

// HeightOf returns the height of a terminal in lines, or 0 if f is not a terminal.
func HeightOf(f *os.File) int {
	_, height, err := term.GetSize(int(f.Fd()))
	if err != nil {
		return 0
	}
	return height
}
