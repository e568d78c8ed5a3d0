() => {  // Escape stops; the list of conversations is open where there is room
  document.addEventListener("keydown", e => { if (e.key === "Escape") document.querySelector("#stop")?.click() });
  const widen = tries => {
    const toggle = document.querySelector(".sidebar .toggle-button");
    if (toggle && innerWidth > 768) toggle.click(); else if (!toggle && tries) setTimeout(widen, 100, tries - 1);
  };
  widen(50);
}
